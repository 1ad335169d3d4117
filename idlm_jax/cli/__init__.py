"""The command line: one short file a verb, which parses and prints."""
