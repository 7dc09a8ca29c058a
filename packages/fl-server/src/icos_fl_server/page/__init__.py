"""The page for people: rounds and losses of all nodes, their health, versions and errors."""
