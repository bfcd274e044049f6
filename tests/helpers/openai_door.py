"""What OpenAI's own client asks for in the tests of the HTTP door."""

from __future__ import annotations

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }} answer in <tool_call>{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASK = {"model": "fake", "messages": [{"role": "user", "content": "hello"}]}
GREEDY = {"temperature": 0.0, "max_completion_tokens": 30}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"type": "integer", "maximum": 99}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
TIME = {
    "type": "function",
    "function": {"name": "time", "parameters": {"type": "object", "additionalProperties": False}},
}


def chat(client, **options):
    return client.chat.completions.create(**(ASK | GREEDY | options))


def streamed(client, **options):
    """(text of each choice, finish reasons, usage) of a stream."""
    texts, reasons, usage = {}, {}, None
    for chunk in chat(client, stream=True, stream_options={"include_usage": True}, **options):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    return texts, reasons, usage
