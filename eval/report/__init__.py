"""Result files, and the tables, plots and pages made of them."""
