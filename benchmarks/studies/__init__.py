"""Questions that were asked once; README.md tells the answers."""
