"""Many people at once, through the interfaces they already use: OpenAI's, Anthropic's, Ollama's.

Needs the extra packages of `earnest[serve]`; nothing else in Earnest imports this room.
"""
