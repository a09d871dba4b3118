"""The methods of routed adapters, a paper a file."""
