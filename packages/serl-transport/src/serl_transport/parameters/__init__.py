"""Published parameters over the wire: pulled in chunks, announced, handed to a callback."""
