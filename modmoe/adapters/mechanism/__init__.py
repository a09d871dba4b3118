"""What all routed adapters share: attaching, passes, routing, losses."""
