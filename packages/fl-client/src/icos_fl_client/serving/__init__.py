"""The forecast service of a node: it follows the windows of the store and keeps what it said."""
