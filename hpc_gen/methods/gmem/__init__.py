"""GMem: a flow transformer conditioned on snippets of an external memory bank (LINs-lab/GMem), and LightningDiT."""
