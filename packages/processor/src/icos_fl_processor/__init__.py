"""Serves a node's window as normalised sequences over gRPC."""
