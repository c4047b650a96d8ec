"""The report of an output folder: one HTML page that needs nothing but itself."""
