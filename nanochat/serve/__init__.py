"""The chat server and the chat in a terminal, with the page they show."""
