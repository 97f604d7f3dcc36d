"""HTTP server with a web page."""
