"""Networks with named stages, and what sits on them."""
