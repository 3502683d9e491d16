"""Published methods, one folder each; the rest of the library sees only `protocol`."""
