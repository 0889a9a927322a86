"""Reviews: read from files of any kind, checked, split, grouped by product."""
