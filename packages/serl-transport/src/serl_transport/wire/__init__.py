"""From a body to frames and back: codec, blobs, checksums, envelopes, and the event loop that polls the sockets."""
