"""How a node comes into a federation: an invitation, and a door that takes it once."""
