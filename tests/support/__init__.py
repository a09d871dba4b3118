"""What tests share: tiny models, stand-ins for the Hub, runs in several processes."""
