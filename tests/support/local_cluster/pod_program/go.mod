module stagetune.io/pod-program

go 1.24
