"""Ways of cutting an FFN's neurons into modules, a way a file."""
