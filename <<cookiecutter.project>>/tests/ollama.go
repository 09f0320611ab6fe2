// Renders chats with Go's text/template the way Ollama runs a Modelfile's TEMPLATE: JSON on stdin, JSON on stdout.
// A template that names .Messages is run once; any other once a turn, cut after .Response in the last.
package main

import (
	"bytes"
	"encoding/json"
	"os"
	"strings"
	"text/template"
	"text/template/parse"
)

type message struct{ Role, Content string }

func main() {
	var request []struct {
		Template string
		Chats    [][]*message
	}
	check(json.NewDecoder(os.Stdin).Decode(&request))
	answers := [][]string{}
	for _, asked := range request {
		rendered := []string{}
		for _, chat := range asked.Chats {
			rendered = append(rendered, render(asked.Template, chat))
		}
		answers = append(answers, rendered)
	}
	check(json.NewEncoder(os.Stdout).Encode(answers))
}

func render(text string, chat []*message) string {
	var out bytes.Buffer
	whole := template.Must(template.New("").Option("missingkey=zero").Parse(text))
	turn := map[string]any{"System": "", "Prompt": "", "Response": ""}
	if strings.Contains(text, ".Messages") {
		turn["Messages"] = chat
		for _, m := range chat {
			if m.Role == "system" {
				turn["System"] = m.Content
			}
		}
		check(whole.Execute(&out, turn))
		return out.String()
	}
	finish := func() {
		check(whole.Execute(&out, turn))
		turn = map[string]any{"System": "", "Prompt": "", "Response": ""}
	}
	for _, m := range chat {
		switch m.Role {
		case "system":
			turn["System"] = m.Content
		case "user":
			if turn["Response"] != "" {
				finish()
			}
			turn["Prompt"] = m.Content
		case "assistant":
			turn["Response"] = m.Content
		}
	}
	nodes := whole.Root.Copy().(*parse.ListNode)
	for n, node := range nodes.Nodes {
		if node.String() == "{{.Response}}" {
			nodes.Nodes = nodes.Nodes[:n]
			break
		}
	}
	last := template.Must(template.New("").AddParseTree("", &parse.Tree{Root: nodes}))
	check(last.Execute(&out, turn))
	return out.String()
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}
