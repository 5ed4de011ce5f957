"""Tiny models with an encoder and a decoder, their batches, and the way in which users call their halves."""

import torch
from transformers import AutoModelForSeq2SeqLM, set_seed
from transformers.models.auto.configuration_auto import AutoConfig


def seq2seq(family="bart", **overrides):
    sizes = {
        "bart": {
            "d_model": 32,
            "encoder_layers": 3,
            "decoder_layers": 3,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 64,
            "dropout": 0.0,
        },
        "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4, "decoder_start_token_id": 0},
    }
    set_seed(0)
    config = AutoConfig.for_model(family, vocab_size=97, **{**sizes[family], **overrides})
    return AutoModelForSeq2SeqLM.from_config(config).eval()


def batch(seed=0, rows=2, padding=(3, 2)):
    """The encoder's tokens padded left, the decoder's right."""
    generator = torch.Generator().manual_seed(seed)
    ids, target = (torch.randint(3, 97, (rows, length), generator=generator) for length in (9, 7))
    mask, target_mask = torch.ones_like(ids), torch.ones_like(target)
    if padding[0]:
        mask[0, : padding[0]] = 0
    if padding[1]:
        target_mask[1, -padding[1] :] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "decoder_input_ids": target,
        "decoder_attention_mask": target_mask,
    }


def by_hand(model, inputs):
    """Encoder and decoder one after the other, as a LightningModule with its own head calls them."""
    body = model.model if hasattr(model, "model") else model
    states = body.encoder(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])[0]
    return body.decoder(
        input_ids=inputs["decoder_input_ids"],
        attention_mask=inputs["decoder_attention_mask"],
        encoder_hidden_states=states,
        encoder_attention_mask=inputs["attention_mask"],
    )[0]
