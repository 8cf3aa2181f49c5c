"""Class-sharded margin heads."""
