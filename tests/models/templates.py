"""Chat templates for SentencePiece models: both write BOS, and fold the system text into the first user turn."""

_FOLD_SYSTEM = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] + '\\n\\n' %}{% set messages = messages[1:] %}"
    "{% else %}{% set system = '' %}{% endif %}"
    "{% for message in messages %}"
    "{% set content = (system if loop.first else '') + message['content'] %}"
)

# As Mistral and Llama 2 have it: no control tokens but BOS and EOS.
MISTRAL = (
    _FOLD_SYSTEM
    + "{% if message['role'] == 'assistant' %}{{ ' ' + content + eos_token }}"
    + "{% else %}{{ '[INST] ' + content + ' [/INST]' }}{% endif %}"
    + "{% endfor %}"
)

# The assistant is called "model".
GEMMA = (
    _FOLD_SYSTEM
    + "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    + "{{ '<start_of_turn>' + role + '\\n' + content + '<end_of_turn>\\n' }}"
    + "{% endfor %}"
    + "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
