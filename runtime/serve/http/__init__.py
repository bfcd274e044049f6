"""The HTTP door: OpenAI's API over the service."""
