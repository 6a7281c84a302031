"""The built-in rules. Each file is a plugin of one mode, and imports only what any plugin can import."""
