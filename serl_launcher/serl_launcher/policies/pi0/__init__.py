"""PI0 and PI0.5: heads, sizes, building and loading."""
