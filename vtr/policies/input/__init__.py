"""Before the tower: policies that act on pictures, before the processor makes pixels of them."""
