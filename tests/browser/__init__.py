"""The playground in a real browser, against a contract fake."""
