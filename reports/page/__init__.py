"""The report as one HTML page that needs no network: ``data`` turns results into plain data, ``build`` into a page."""
