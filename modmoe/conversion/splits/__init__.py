"""Published ways of splitting an FFN into experts."""
