"""GR00T N1.6: configuration and modules, backbone's pass, head, inputs, sizes, building."""
