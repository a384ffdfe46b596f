"""HTML and Markdown pages that tasks write."""
