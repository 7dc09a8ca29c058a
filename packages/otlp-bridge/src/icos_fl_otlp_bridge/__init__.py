"""Receives OTLP metrics and stores the configured ones as rows of each node's window."""
