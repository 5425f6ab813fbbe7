"""Episodes on disk and in memory, and the training windows cut from them."""
