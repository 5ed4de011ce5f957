"""The weights that bitsandbytes' own functions give, which quantized layers are compared with."""

from bitsandbytes import functional

# bitsandbytes repacks weights whose sides are multiples of 64
EVEN = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4, "head_dim": 16}


def rounded(weight, mode, double_quant=True):
    """The weight after bitsandbytes' own rounding, as (out, in)."""
    if mode == "int8":
        codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
        return codes.float() * scales[:, None] / 127
    codes, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=double_quant, quant_type=mode)
    return functional.dequantize_4bit(codes, state)
