"""torchslim's recipes beside the best pipelines of other libraries, on three jobs of the gallery."""
