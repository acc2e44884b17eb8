"""What tests of prompts share: tokenizers with a chat template or without, and a style for them."""

import tiny
import tokenizers
import transformers

from opd_jax.data.prompts import Style

CHAT = tiny.chat_tokenizer()
END, BEGIN, TURN, OVER, QUIET = CHAT.convert_tokens_to_ids(
    ['<|end|>', '<|begin|>', '<|turn|>', '<|over|>', '<|quiet|>'])


def style(chat=CHAT, **fields):
  """The template of a tokenizer, and two tokens that end a turn."""
  return Style(template='student', chat=chat, stop_tokens=(END, OVER), **fields)


def metaspace_tokenizer():
  """One that puts a space before every text, as those of Llama 2 and Mistral do."""
  spaces = dict(replacement='▁', prepend_scheme='always', split=False)
  inner = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token='<unk>'))
  inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(**spaces)
  inner.decoder = tokenizers.decoders.Metaspace(**spaces)
  inner.train_from_iterator(
      ['What is one? The answer is: one two 1 2'] * 4, tokenizers.trainers.BpeTrainer(
          vocab_size=60, show_progress=False, special_tokens=['<unk>', '<s>', '</s>']))
  return transformers.PreTrainedTokenizerFast(
      tokenizer_object=inner, eos_token='</s>', bos_token='<s>', unk_token='<unk>',
      clean_up_tokenization_spaces=False)
