"""What every module may use: text, redaction, versions, processes."""
