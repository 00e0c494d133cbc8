from flashnorm.cli import main

main()
