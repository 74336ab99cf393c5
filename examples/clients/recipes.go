// A field, a file of any size and a batch with Go's standard library.
// Needs Go 1.19. Usage: go run recipes.go FILE, with KEYFOLD_URL and KEYFOLD_API_KEY set.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
)

type problem struct {
	Code   string `json:"code"`
	Detail string `json:"detail"`
}

type item struct {
	Ref        string            `json:"ref,omitempty"`
	Plaintext  []byte            `json:"plaintext,omitempty"` // encoding/json writes bytes in base64
	Ciphertext string            `json:"ciphertext,omitempty"`
	Context    map[string]string `json:"context,omitempty"`
}

func post(path, mediaType string, body io.Reader, context string) (*http.Response, error) {
	request, err := http.NewRequest("POST", os.Getenv("KEYFOLD_URL")+path, body)
	if err != nil {
		return nil, err
	}
	request.Header.Set("Authorization", "Bearer "+os.Getenv("KEYFOLD_API_KEY"))
	request.Header.Set("Content-Type", mediaType)
	if context != "" {
		request.Header.Set("Keyfold-Context", context)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return nil, err
	}
	if response.StatusCode != http.StatusOK {
		defer response.Body.Close()
		var problem problem
		_ = json.NewDecoder(response.Body).Decode(&problem)
		return nil, fmt.Errorf("%s answers %s: %s", path, problem.Code, problem.Detail)
	}
	return response, nil
}

func call(path string, body, answer any) error {
	encoded, err := json.Marshal(body)
	if err != nil {
		return err
	}
	response, err := post(path, "application/json", bytes.NewReader(encoded), "")
	if err != nil {
		return err
	}
	defer response.Body.Close()
	return json.NewDecoder(response.Body).Decode(answer)
}

func field() error {
	// The context binds the ciphertext to its row: it opens nowhere else.
	context := map[string]string{"table": "people", "column": "name", "row": "42"}
	var sealed, opened item
	if err := call("/v1/encrypt", item{Plaintext: []byte("Ada Lovelace"), Context: context}, &sealed); err != nil {
		return err
	}
	if err := call("/v1/decrypt", item{Ciphertext: sealed.Ciphertext, Context: context}, &opened); err != nil {
		return err
	}
	if string(opened.Plaintext) != "Ada Lovelace" {
		return errors.New("another plaintext came back")
	}
	return nil
}

func stream(path, source, target string) error {
	file, err := os.Open(source)
	if err != nil {
		return err
	}
	defer file.Close()
	response, err := post(path, "application/octet-stream", file, `name="report"`)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	part, err := os.Create(target + ".part")
	if err != nil {
		return err
	}
	// A broken transfer is an error here, and the file never gets its name.
	if _, err = io.Copy(part, response.Body); err != nil {
		part.Close()
		return err
	}
	if err = part.Close(); err != nil {
		return err
	}
	return os.Rename(target+".part", target)
}

func batch() error {
	var items []item
	for n := 0; n < 1000; n++ {
		items = append(items, item{Ref: fmt.Sprint("row-", n), Plaintext: []byte(fmt.Sprint(n))})
	}
	var answer struct {
		Items []struct {
			item
			Error *problem `json:"error"`
		} `json:"items"`
		Failed int `json:"failed"`
	}
	if err := call("/v1/encrypt/batch", map[string]any{"items": items}, &answer); err != nil {
		return err
	}
	// Each item has its own outcome: a ciphertext, or an error with a code.
	if answer.Failed != 0 {
		return fmt.Errorf("%d items failed", answer.Failed)
	}
	return nil
}

func main() {
	file := os.Args[1]
	steps := []func() error{
		field,
		batch,
		func() error { return stream("/v1/encrypt", file, file+".kf") },
		func() error { return stream("/v1/decrypt", file+".kf", file+".out") },
	}
	for _, step := range steps {
		if err := step(); err != nil {
			log.Fatal(err)
		}
	}
	fmt.Println("field, file and batch: done")
}
