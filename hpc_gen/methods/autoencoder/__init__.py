"""Training of KL autoencoders on our own images: what the tokenizer `kl_vae` then encodes and decodes with."""
