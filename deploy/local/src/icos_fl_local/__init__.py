"""The single-node deployment: every part of ICOS-FL as local processes, by one command."""
