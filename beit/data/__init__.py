"""Images: finding, decoding, transforming and batching them."""
