// What runs in the pods of the tests' own image, and as the first process of a node: one small
// program without dependencies, so that an image of it is one file. Its first argument says what
// it does; a pod's last word is its termination message.
package main

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

// terminationLog is where Kubernetes looks for a container's termination message.
const terminationLog = "/dev/termination-log"

var commands = map[string]func(args []string) error{
	"pause":  pause,
	"serve":  serve,
	"fetch":  fetch,
	"write":  write,
	"read":   read,
	"report": report,
}

func main() {
	err := errors.New("say what to do: pause, serve, fetch, write, read or report")
	if len(os.Args) > 1 {
		if command, found := commands[os.Args[1]]; found {
			err = command(os.Args[2:])
		}
	}
	if err != nil {
		say(err.Error())
		os.Exit(1)
	}
}

// pause waits until it is told to end, and meanwhile takes the exit codes of those processes whose
// parents are gone: the first process of a PID namespace owes them that.
func pause([]string) error {
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGCHLD)
	for received := range signals {
		if received != syscall.SIGCHLD {
			return nil
		}
		for {
			if ended, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil); ended <= 0 || err != nil {
				break
			}
		}
	}
	return nil
}

// serve answers every request on the address args[0] with the text args[1].
func serve(args []string) error {
	if len(args) != 2 {
		return errors.New("serve ADDRESS TEXT")
	}
	answer := func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, args[1]) }
	return http.ListenAndServe(args[0], http.HandlerFunc(answer))
}

// fetch says what the URL args[0] answers, having tried for as long as args[1] says.
func fetch(args []string) error {
	if len(args) != 2 {
		return errors.New("fetch URL DURATION")
	}
	patience, err := time.ParseDuration(args[1])
	if err != nil {
		return err
	}
	client := http.Client{Timeout: 5 * time.Second}
	for deadline := time.Now().Add(patience); ; time.Sleep(200 * time.Millisecond) {
		var text string
		if text, err = get(&client, args[0]); err == nil {
			return say(text)
		}
		if time.Now().After(deadline) {
			return err
		}
	}
}

func get(client *http.Client, url string) (string, error) {
	response, err := client.Get(url)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return "", errors.New(response.Status)
	}
	body, err := io.ReadAll(response.Body)
	return string(body), err
}

// write puts the text args[1] into the file args[0].
func write(args []string) error {
	if len(args) != 2 {
		return errors.New("write FILE TEXT")
	}
	return os.WriteFile(args[0], []byte(args[1]), 0o644)
}

// read says what is in the file args[0].
func read(args []string) error {
	if len(args) != 1 {
		return errors.New("read FILE")
	}
	content, err := os.ReadFile(args[0])
	if err != nil {
		return err
	}
	return say(string(content))
}

// report says as whom it runs and what it may do, in lines of "name value": the kernel's own words
// on its user, group and capabilities, and whether a file can be made in the folder of every
// argument.
func report(folders []string) error {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return err
	}
	lines := []string{}
	for line := range strings.Lines(string(status)) {
		name, value, _ := strings.Cut(line, ":")
		switch name {
		case "Uid", "Gid", "CapEff", "CapBnd", "NoNewPrivs", "Seccomp":
			// Users and groups are four numbers; those that count are alike.
			lines = append(lines, name+" "+strings.Fields(value)[0])
		}
	}
	for _, folder := range folders {
		file, err := os.CreateTemp(folder, "report-")
		if err == nil {
			file.Close()
			os.Remove(file.Name())
		}
		lines = append(lines, fmt.Sprintf("writable:%s %t", folder, err == nil))
	}
	return say(strings.Join(lines, "\n"))
}

// say prints the text and leaves it as the termination message, where there is a place for one.
func say(text string) error {
	fmt.Println(text)
	file, err := os.OpenFile(terminationLog, os.O_WRONLY|os.O_TRUNC, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer file.Close()
	_, err = file.WriteString(text)
	return err
}
