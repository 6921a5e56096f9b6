"""GR00T N1.7: head, backbone, sizes, building and loading."""
