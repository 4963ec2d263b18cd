"""What a reader of the paper can skip: one file a topic, each of which may use the modules at the top, never the other way."""
