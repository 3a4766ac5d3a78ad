"""Running statistics of what modules give, as a plugin of surgery-core."""
