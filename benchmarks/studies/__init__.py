"""Questions that were asked once; the answers are in README.md."""
