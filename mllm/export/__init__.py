"""Write an assembly as a stock class of transformers, and prove it equal."""
