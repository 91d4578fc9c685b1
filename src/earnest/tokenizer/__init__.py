"""Text to token ids and back, and chat templates.

`Tokenizer` is one face over three kinds of vocabulary: SentencePiece (`tokenizer.model`, GGUF
"llama"), and the byte-pair encoders of the `tokenizers` library (`tokenizer.json`, GGUF "gpt2").
"""

from earnest.tokenizer.detokenizer import Detokenizer
from earnest.tokenizer.template import ChatTemplate, builtin_template
from earnest.tokenizer.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "Detokenizer", "Tokenizer", "builtin_template"]
