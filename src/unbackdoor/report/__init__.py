"""Reports: results as HTML that needs nothing but a browser. Knows no method. See docs/architecture.md."""
