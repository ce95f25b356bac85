"""An OpenAI-compatible server around the engine (section 5): HTTP in, tokens out."""
